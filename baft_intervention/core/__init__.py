"""The method as plain tensor functions: the map, its orthonormal basis, losses and position rules."""
