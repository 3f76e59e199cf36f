"""The ladder: verifiable visual questions in curriculum order, kept in tar shards with random access."""
