"""Imports all modules with attacks, which put themselves into the table."""

import bombs
import foreign_references
import forged_shards
import hostile_texts

MODULES = (bombs, foreign_references, forged_shards, hostile_texts)
