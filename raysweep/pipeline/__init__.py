"""Pipelines: YAML of stages, each run once for what goes into it. A new stage is a file and a line
in `AnyStage`.
"""
