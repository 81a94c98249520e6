"""What a scenario file means, in either world."""
