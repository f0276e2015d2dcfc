"""What a verify costs: v(M), and what it is measured against."""
