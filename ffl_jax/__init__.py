"""Online knowledge distillation in JAX: several networks train together and teach one another."""
