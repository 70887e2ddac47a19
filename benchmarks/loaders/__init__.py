"""How are data loaders measured, verified and compared?"""
