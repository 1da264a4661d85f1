"""What an adapter is generated from: typological feature vectors of English varieties."""
