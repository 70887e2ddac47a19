"""What does the resolution sweep plan, measure, compute and draw?"""
