"""Which operations on uint8 images are the same on every device?"""
