"""From a recipe to Bridge's ``pretrain()``."""
