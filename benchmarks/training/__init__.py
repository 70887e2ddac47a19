"""How is training measured, and which ablations are there?"""
