"""From parameters to adapted trees and back."""
