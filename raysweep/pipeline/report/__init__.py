"""The report stage: sections, figures, and the document that holds them."""
