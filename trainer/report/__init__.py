"""HTML reports of one run or several runs, with their charts, sheets of images and Grad-CAM maps."""
