"""Model classes that tokensieve needs and transformers does not have; nothing is registered at import."""
