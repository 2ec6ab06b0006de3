"""The report stage: its sections, figures and document."""
