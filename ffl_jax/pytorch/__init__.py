"""What comes from PyTorch: published weights."""
