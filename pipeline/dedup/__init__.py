"""Images that two splits or two sets share: exact copies by digests, changed copies by perceptual hashes."""
