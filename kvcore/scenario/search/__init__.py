"""Exhaustive search over the real machines in small worlds: every order, loss, doubling and crash within a budget."""
