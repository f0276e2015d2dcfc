"""What drafting loses where it fails: counted on traces, and measured by the clock."""
