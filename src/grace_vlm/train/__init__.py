"""The training loop: recipe, masters, teacher, step, record."""
