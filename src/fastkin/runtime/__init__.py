"""Helpers around asyncio: threads for disks, deadlines, what outlives a dropped owner."""
