"""Training and evaluation of gated networks: methods, losses, data, recipes, the loop."""
