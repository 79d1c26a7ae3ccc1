"""Online knowledge distillation in JAX: several networks train together and teach one another."""

__version__ = "0.1.0"
