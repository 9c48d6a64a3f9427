"""Training: one explicit loop on torch's own parts."""
