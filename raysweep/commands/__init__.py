"""The commands of `raysweep`, one module each.

A command module has `SUMMARY`, `DESCRIPTION` and `EXAMPLES` (its help), `add_parser` (its
arguments), a frozen dataclass `...Request` (its arguments with types) and `run_command`, which
converts parsed arguments to a request and runs it. A command that fails raises an error of
`raysweep.errors`, from which `raysweep.cli` makes lines and the exit code. `options` holds the
options that several commands share, `common` what several commands do.

The top level of these modules imports the standard library and `options` only, so that
`raysweep --help` answers at once; functions import what they need.
"""
