"""Methods of tokensieve inside vLLM: see docs/vllm.md.

The engine finds `plugin.register` through the entry-point group ``vllm.general_plugins``. Nothing in this package
imports vLLM before the engine itself runs, except the modules of the single model families.
"""

from tokensieve.bridges.vllm.arguments import engine_arguments, server_flags
from tokensieve.bridges.vllm.choice import PREFIX, Choice
from tokensieve.bridges.vllm.families import FAMILIES, qualifying_methods, why_not
from tokensieve.bridges.vllm.plugin import register

__all__ = [
    "FAMILIES",
    "PREFIX",
    "Choice",
    "engine_arguments",
    "qualifying_methods",
    "register",
    "server_flags",
    "why_not",
]
