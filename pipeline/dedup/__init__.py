"""Images shared by two splits or two data sets: exact copies by digests, changed copies by perceptual hashes.

Reading order: `perceptual_hash`, `hamming_index`, `near_duplicates`, `between_splits`, `overlap` (command).
"""
