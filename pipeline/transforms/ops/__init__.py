"""Operations on batches of uint8 images, with the same result on every device."""
