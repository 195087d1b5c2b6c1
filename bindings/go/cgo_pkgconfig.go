//go:build !phd_vendored

package phd

// #cgo pkg-config: phd
import "C"
