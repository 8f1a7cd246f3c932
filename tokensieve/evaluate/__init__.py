"""The evaluation protocols of PPLLaVA: open questions with a judge, MVBench, Video-MME with and without subtitles.

    python -m tokensieve.evaluate answer --task mvbench --annotations json --videos video -m my-ppllava -o a.jsonl
    python -m tokensieve.evaluate judge -i a.jsonl --url http://127.0.0.1:8000/v1 --judge some-model -o j.jsonl
    python -m tokensieve.evaluate score -i a.jsonl

Where lmms-eval has a task, its numbers are the ones to publish (`tokensieve` is a model there too); these protocols are
those of the paper, with prompts in words of our own that can be replaced.

- :mod:`.questions`, loaders of the public annotation files,
- :mod:`.protocols`, prompts, and what the text tower reads,
- :mod:`.answering`, from questions to answers of a model,
- :mod:`.judging`, an OpenAI-compatible judge,
- :mod:`.scoring`, accuracies and scores from answers on disk.
"""
