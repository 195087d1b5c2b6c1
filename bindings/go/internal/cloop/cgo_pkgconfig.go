//go:build !phd_vendored

package cloop

// #cgo pkg-config: phd
import "C"
