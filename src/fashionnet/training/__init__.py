"""Fitting a network: the loop, its gradients, optimizer, early stopping and metrics."""
