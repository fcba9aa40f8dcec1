"""Two small tasks that the README trains on: sorting digits, copying letters."""
