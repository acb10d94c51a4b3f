"""The side of the broker: packets, acknowledgements, connections, subscriptions."""
