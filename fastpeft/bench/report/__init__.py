"""Pages, pictures and comparisons made of records: of these alone, and the same bytes for the same records."""
