"""What several tests share: servers, stand-ins for peers, rigs, the oracle."""
