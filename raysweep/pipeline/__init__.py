"""Pipelines: stages in YAML, each of which runs once for equal inputs.

A new kind of stage is a subclass of `Stage` and an entry in `AnyStage`.
"""
