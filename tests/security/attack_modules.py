"""Imports all modules with attacks, which put themselves into the table."""

import bombs
import forged_shards

MODULES = (bombs, forged_shards)
