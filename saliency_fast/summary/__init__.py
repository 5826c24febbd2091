"""From scores to words: parts of a map, concepts of many, and sentences that a person can check."""
