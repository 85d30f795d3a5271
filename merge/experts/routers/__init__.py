"""How tokens find their experts: rows before any training, where they are, what they do with texts."""
