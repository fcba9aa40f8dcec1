"""Entry points: `tide-hf chat`, and what the recipes share."""
