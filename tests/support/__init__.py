"""The tests share these helpers: real models, servers, shards, and checks that nothing is left."""
