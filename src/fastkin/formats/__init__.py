"""What a message becomes, as far as Python decides it: keys, filters, events, what is added. The work per record is in
codec/.
"""
