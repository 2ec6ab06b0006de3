"""Imports all modules with attacks, which put themselves into the table."""

import bombs

MODULES = (bombs,)
