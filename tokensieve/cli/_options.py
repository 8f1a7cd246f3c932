"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Video = Annotated[
    str, typer.Argument(help="Video, animation or image: a path or an http(s) address.", show_default=False)
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Folder of a model or its name on the Hugging Face hub. Without it the bundled model runs, which knows "
        "only the clips of 'tokensieve world'.",
        show_default=False,
    ),
]
MethodName = Annotated[
    str,
    typer.Option(
        "--method",
        help="Compression method: a name, 'name:option=value,...' or 'a+b' over stages; see 'tokensieve list methods'.",
    ),
]
Retention = Annotated[
    float | None,
    typer.Option(
        "--retention",
        "-r",
        help="Share of the visual tokens to keep, in (0, 1]; the method's default is 0.25.",
        show_default=False,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="OPTION=VALUE", help="Option of the method; repeat for several.", show_default=False),
]
Frames = Annotated[int, typer.Option("--frames", "-n", help="Frames to take, spread evenly over the clip.")]
FramesPerSecond = Annotated[
    float | None,
    typer.Option("--fps", help="Take this many frames per second instead, at most --frames.", show_default=False),
]
Start = Annotated[float | None, typer.Option("--start", help="Begin at this second.", show_default=False)]
End = Annotated[float | None, typer.Option("--end", help="Stop at this second.", show_default=False)]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:1.")]
Attention = Annotated[
    str | None,
    typer.Option("--attn", help="Attention kernel: sdpa, eager or flash_attention_2.", show_default=False),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of methods that draw at random.", show_default=False)]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let the model run code that comes with it.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="Show no progress bars.")]
