"""Training of the bundled models, in two stages.

:mod:`.labels` (what frames show) -> :mod:`.tower` (first stage) -> :mod:`.clips` (clips encoded once, in a process of
their own) and :mod:`.turns` (questions as tokens) -> :mod:`.answerer` with :mod:`.grounding` (second stage) ->
:mod:`.run` (both, and the saved models). :mod:`.attention`, :mod:`.optimise` and :mod:`.state` serve both stages.
"""
