"""Coupled groups, their importance, the plan, and the surgery."""
