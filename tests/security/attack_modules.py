"""Imports all modules with attacks, which put themselves into the table."""

import bombs
import foreign_references
import forged_shards
import hostile_texts
import named_code

MODULES = (bombs, foreign_references, forged_shards, hostile_texts, named_code)
