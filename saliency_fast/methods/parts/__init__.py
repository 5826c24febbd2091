"""What recipes are made of: rules of quadrature, windows, coalitions, walks, drawing, checks."""
