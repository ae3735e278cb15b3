"""What the tests share: real models, servers, shards, and checks of what is left behind."""
