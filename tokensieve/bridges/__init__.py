"""Where compressed models are used: an OpenAI-compatible server, batches over folders of videos, lmms-eval."""
