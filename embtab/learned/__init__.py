"""Tables that learn their own shape while they are trained, within a byte budget."""
