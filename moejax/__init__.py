"""Sparse Mixture-of-Experts models in JAX and Flax."""
